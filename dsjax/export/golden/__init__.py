"""Golden numbers: of whole programs, of named operators by themselves, and inputs at their edges."""
