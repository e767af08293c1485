"""What a run will be, before any process starts: where what runs, its parameters, work, memory and traffic."""
