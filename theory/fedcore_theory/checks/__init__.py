"""Every check, one per file, one folder per paper; :mod:`fedcore_theory.catalog` finds them."""
