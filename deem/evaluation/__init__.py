"""Benchmarks: questions, answers, how answers are read and scored, captions, drawings."""
