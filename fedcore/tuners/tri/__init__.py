"""The tri-factor adapter as a PEFT tuner."""
