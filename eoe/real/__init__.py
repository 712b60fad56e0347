"""Scale real: what envisioned names are worth on public images with a zero-shot classifier that needs no download."""
