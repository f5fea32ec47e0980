"""From files to prompts: rows, chat messages, images, and the order in which prompts are drawn."""
