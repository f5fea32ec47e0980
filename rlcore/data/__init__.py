"""From files to prompts: rows, chat messages, images, and sampling order."""
