"""One distributed-training technique a file. `python -m recipes` lists them."""
