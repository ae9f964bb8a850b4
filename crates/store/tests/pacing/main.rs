//! How a store slows down, in virtual time, on a device whose time is shared by all: writers as the journal fills up
//! (INV-ADMIT), and the cleaner while it holds them up (INV-YIELD).

mod admission;
mod bench;
mod giving_way;
