"""The recipe of `lab-dense`: boards full of like things, and questions whose evidence is spread over many of them."""
