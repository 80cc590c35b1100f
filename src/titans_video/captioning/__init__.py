"""Write captions with an image-text-to-text model, and review them in a browser."""
