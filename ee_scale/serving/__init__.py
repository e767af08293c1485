"""A server that answers OpenAI's API with the decode loop: requests in, rows of a queue, text out as it comes."""
