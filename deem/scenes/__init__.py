"""Scenes of digits or photographs: how they are made, what is pretrained on them, what is measured on them."""
