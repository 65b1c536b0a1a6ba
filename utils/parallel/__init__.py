"""What any training code needs; knows nothing of this project's models."""
