"""Methods on tri-factor adapters, W0 + s B R A."""
