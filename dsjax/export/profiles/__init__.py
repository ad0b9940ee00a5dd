"""What compilers take, as data (*.toml), and what of a module violates it."""
