"""What lowers, compiles, agrees and how fast, on every backend: the study of portability."""
