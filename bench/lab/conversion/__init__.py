"""What converting costs, beside GPTQModel."""
