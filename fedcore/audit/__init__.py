"""The gradient-inversion audit: what one upload shows of its pictures, as a plug-in command."""
