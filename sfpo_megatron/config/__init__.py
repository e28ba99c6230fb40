"""Config: frozen dataclasses (`tree`), their loading (`load`) and their cross-checks (`check`)."""
