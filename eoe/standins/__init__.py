"""Stand-ins of the embedded default: drawn pictures, a small encoder and a rule for names; a synthetic space."""
