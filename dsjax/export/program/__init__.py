"""One program to export: how it is lowered, what its arguments and results are, what its parameters weigh."""
