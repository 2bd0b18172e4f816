"""What the scripts share: a model, a text, measuring, launching ranks, reporting."""
