"""Answers of language models: tasks, scoring, and models compared with their base."""
