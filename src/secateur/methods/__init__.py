"""One paper, one file. A method composes discovery, scoring, allocation and surgery in its paper's order."""
