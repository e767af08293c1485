"""What exits are worth: loss, perplexity and agreement with the final layer, as tables, files and plots."""
