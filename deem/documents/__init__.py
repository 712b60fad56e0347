"""Documents: what they are made of, readers of the public sets, prompts, and their way to tokens."""
