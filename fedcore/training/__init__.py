"""Local training: texts, models, partitions, the frozen prefix, steps and evaluation."""
