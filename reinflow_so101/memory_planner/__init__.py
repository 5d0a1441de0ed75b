"""What a training needs of GPU memory and RAM, before it starts. Nothing but its command imports this."""
