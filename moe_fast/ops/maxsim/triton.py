"""maxsim on a GPU (to come in this file)."""
