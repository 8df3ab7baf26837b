"""The paper's experiments, repeated: its tables (tables.py as data, grid.py runs them) and its figure (figure1.py)."""
