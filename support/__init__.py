"""What every run needs and no paper is about: text, files, settings."""
