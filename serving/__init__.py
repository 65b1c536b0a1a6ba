"""The live demo: a web page that shows videos while they are made. Not here: making them (generation)."""
