"""Frozen segmenters behind one interface: GrabCut, which needs no weights, and the SAM family."""
