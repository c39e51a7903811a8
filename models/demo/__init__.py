"""The trained demo model, its samples of Fashion-MNIST, and how both were made."""
