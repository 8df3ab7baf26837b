"""The paper's experiments, repeated: each is a function that writes its figures, and its picture if it has one."""
