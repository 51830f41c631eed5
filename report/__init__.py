"""What update_readme.py stands on: how a run is read, and how its results become Markdown and pictures."""
