"""Who comes in and as whom: keys, certificates, scopes, and the record of what was changed."""
