"""The Gram adapter as a PEFT tuner."""
