"""Tables, figures and pages of run folders. Nothing here trains."""
