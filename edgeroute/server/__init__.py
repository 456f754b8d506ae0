"""The HTTP server: an OpenAI-compatible endpoint over Runtimes."""
