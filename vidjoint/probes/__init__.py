"""How good the features of a frozen model are: k nearest neighbours, a linear and an attentive classifier on top of them."""
