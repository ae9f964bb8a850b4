//! The blocks of a replica over its journal, on a disk that loses, tears, rots and fills up, against a reference.

mod bounds;
mod budget;
mod crashes;
mod full;
mod golden;
mod heal;
mod heal_layers;
mod layers;
mod lost;
mod owners;
mod replica;
mod rot;
