"""How a run is spread over ranks; knows nothing of this project's models."""
