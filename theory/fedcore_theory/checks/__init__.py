"""Every check, one a file, in a folder for each paper; :mod:`fedcore_theory.catalog` finds them."""
