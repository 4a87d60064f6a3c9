"""The artifact: manifest, certificate, graphs and files, checked before they are used."""
