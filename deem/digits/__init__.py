"""The digit scenes: how they are made, what stands in for downloaded weights, what is measured on them."""
