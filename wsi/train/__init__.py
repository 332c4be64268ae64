"""Training: bags and labels in, a model folder out. With ``nn`` the only door to torch."""
