"""What train.py stands on. Nothing in here imports train.py, and nothing imports in a circle."""
