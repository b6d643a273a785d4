"""The objects of the API as typed frozen values, and the conditions of a status."""
