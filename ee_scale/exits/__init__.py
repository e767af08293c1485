"""The training side of exits: where they sit, how they are initialised and what they are trained on."""
