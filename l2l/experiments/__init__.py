"""Methods against each other at equal forward passes."""
