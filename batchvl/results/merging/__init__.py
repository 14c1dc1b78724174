"""The merge of an output's rows into one file, with the manifest's columns on request."""
