"""Outlier names: what a language model is asked, who answers, how answers are read and cleaned, and where names lie."""
